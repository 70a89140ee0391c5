"""What happens around a forward pass."""

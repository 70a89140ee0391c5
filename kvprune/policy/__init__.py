"""What a policy is, and what most of them share."""

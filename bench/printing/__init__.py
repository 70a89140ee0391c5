"""What is printed: tables, reports, and JSON with its provenance."""

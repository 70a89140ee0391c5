"""Who is measured, in which process and environment, and in which turn."""

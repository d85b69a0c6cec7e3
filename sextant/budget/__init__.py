"""What a declaration will cost before it runs."""

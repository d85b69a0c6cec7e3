"""The model: its declaration, the rules between its parts, and the single-device transformer."""

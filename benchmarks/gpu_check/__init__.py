"""What one GPU can prove of this project: see __main__.py."""

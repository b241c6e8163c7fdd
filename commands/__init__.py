"""What the commands of main.py do besides training: one file each, imported when its command is called."""

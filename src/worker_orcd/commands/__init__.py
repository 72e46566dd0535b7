"""What the commands of the command line do; cli.py says which there are."""

"""The commands of `heal`, each with its arguments: `main(command, argv, progress)` gives the exit status."""

"""The command line, `codellama-rt`."""

"""`python -m codellama_rt`: the command line `codellama-rt`."""

from codellama_rt.cli.main import main

if __name__ == "__main__":
    main()

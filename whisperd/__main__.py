"""`python -m whisperd` is the daemon's command."""

from whisperd.daemon.main import main

if __name__ == "__main__":
    main()

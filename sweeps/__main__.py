"""python -m sweeps."""

from sweeps.command import main

if __name__ == "__main__":
    main()

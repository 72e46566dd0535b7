"""`python -m worker_orcd` is `worker-orcd`."""

from worker_orcd.cli import main

if __name__ == "__main__":
    main()

"""`python -m accord.cli` is `accord`."""

from accord.cli import app

if __name__ == "__main__":
    app()

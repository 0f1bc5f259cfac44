"""``python -m secimg_watch``."""

from secimg_watch.cli import main

if __name__ == "__main__":
    main()

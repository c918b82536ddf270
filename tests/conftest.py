"""What all tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # demo assets come from PyPI; nothing in the tests asks a model hub

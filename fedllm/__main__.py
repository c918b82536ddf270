"""`python -m fedllm`."""

from fedllm.cli import main

main()

"""The rows of the paper: what makes each, and what is there of it. The program is eval/paper.py."""

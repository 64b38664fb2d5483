"""The systems that the paper compares with, each rebuilt from what its paper and its published files say."""

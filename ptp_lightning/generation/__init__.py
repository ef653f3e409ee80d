"""The command `generate`: continuations on a terminal or a page, with the tokens of each call, and their speed."""

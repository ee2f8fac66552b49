"""What is measured where nothing else is said, apart from what measures: a command's help need not import that."""

#: a text's beginning that is taken as a prompt
PROMPT_TOKENS = 256

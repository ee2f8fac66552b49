// Prompts to begin with: for completion, code to go on with; for chat, the same as a question. Seed and temperature are
// ones with which the bundled pair goes on well, and does not repeat itself.

export const SAMPLES = [
  {
    name: "Field",
    seed: 10,
    temperature: 0.3,
    completion: `class Field:
    """A field of a form."""

    def __init__(self, name, required=True, default=None):
        self.name = name
        self.required = required
        self.default = default

    def clean(self, value):
`,
    chat: "Write a Python class for a field of a form, with a default value and a method that checks a value.",
  },
  {
    name: "Error",
    seed: 11,
    temperature: 0.7,
    completion: `class ParseError(Exception):
    """Raised for text that can not be parsed."""

    def __init__(self, message, line, column):
`,
    chat: "Write a Python exception for text that can not be parsed, with line and column.",
  },
  {
    name: "Client",
    seed: 3,
    temperature: 0.7,
    completion: `import urllib.request


class Client:
    """A client for a JSON API."""

    def __init__(self, url, timeout=10):
        self.url = url
        self.timeout = timeout

    def get(self, path):
`,
    chat: "Write a small Python client for a JSON API, with urllib only.",
  },
  {
    name: "Array",
    seed: 11,
    temperature: 0.5,
    completion: `import numpy as np


def normalise(x, axis=None):
    """
    Scale an array to length one.

    Parameters
    ----------
    x : array_like
`,
    chat: "Write a numpy function that scales an array to length one along an axis, with a docstring.",
  },
];

// Prompts to begin with: for completion, code to go on with; for chat, the same as a question.

export const SAMPLES = [
  {
    name: "Settings",
    completion: `"""Read settings from a file."""

import json
import os


class SettingsError(Exception):
    """Raised when the settings can not be read."""


def load_settings(path, encoding="utf-8"):
`,
    chat: "Write a Python function that loads settings from a JSON file, with a clear error for a bad one.",
  },
  {
    name: "Stack",
    completion: `class Stack:
    """A last-in, first-out collection."""

    def __init__(self):
        self.items = []

    def push(self, item):
`,
    chat: "Write a Python class for a stack, with push, pop and len.",
  },
  {
    name: "Test case",
    completion: `import unittest


class TestPoint(unittest.TestCase):
    def setUp(self):
        self.point = Point(1, 2)

    def test_equality(self):
`,
    chat: "Write a unittest test case for a Python class Point(x, y).",
  },
  {
    name: "CSV rows",
    completion: `import csv


def read_rows(path):
    """Yield the rows of a CSV file as dictionaries."""
    with open(path, newline="") as file:
`,
    chat: "Write a Python generator that yields the rows of a CSV file as dictionaries.",
  },
];

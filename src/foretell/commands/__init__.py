"""The sub-commands. Each module offers `command`, imports torch only inside functions and holds no logic of its own."""

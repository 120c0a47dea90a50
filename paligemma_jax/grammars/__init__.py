"""Grammars that generated answers follow, compiled to automata over tokens."""

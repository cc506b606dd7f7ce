"""Errors, strict YAML and durable files; imports nothing of ours."""

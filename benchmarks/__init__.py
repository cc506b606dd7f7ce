"""What benchmark.py measures, one file per benchmark; results/ holds JSON with machine, versions, commit and command."""

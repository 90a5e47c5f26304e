"""Many runs: which they are, where each lies, and the processes or jobs that do them."""

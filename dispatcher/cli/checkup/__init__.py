"""What `dispatcher doctor` looks at: this host, and the database. Each look is a function that returns findings."""

"""Memory: everything that speaks SQL, and nothing that does not."""

"""What `instep bench` measures on a user's machine; tests/bench measures other systems with the same modules."""

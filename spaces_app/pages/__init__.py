"""What people see: the conversation."""

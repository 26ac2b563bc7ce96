"""What a decode step does before its layers."""

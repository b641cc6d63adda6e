"""What people look at: labelled sheets and curves."""

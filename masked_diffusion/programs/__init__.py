"""What the scripts do once their flags are checked: this room imports torch, the scripts themselves do not."""

"""The `kvfold` command and those of its subcommands that are clients."""

"""The server's subcommands of `kvfold`. Their modules import quickly; torch comes in when one runs."""

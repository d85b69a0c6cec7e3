"""The foundation that every other layer stands on: declarations, errors, costs, streams, states, durable files."""

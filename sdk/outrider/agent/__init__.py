"""The daemon of a board: reads a source, answers by one model, reports, and takes signed commands. docs/agent.md."""

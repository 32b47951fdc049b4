"""Executions: a function of one task, run over the tasks of a batch."""

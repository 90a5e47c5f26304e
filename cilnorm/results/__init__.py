"""Finished runs, read: tables, comparisons, reports, probes, weights for others. Changes nothing in a run."""

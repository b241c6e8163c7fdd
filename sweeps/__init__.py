"""Ablations: arms of one run file, trained in pairs, compared with statistics, shown on one page."""

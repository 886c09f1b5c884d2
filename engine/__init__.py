"""Where a run happens: launch -> assemble -> the loop of steps -> checkpoint and report. Imports all above."""

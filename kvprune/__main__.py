from kvprune.cli import main

main()

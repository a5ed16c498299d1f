from .grade import main

main()

from .pretrain import main

main()

"""What do fewer choices per segment do to the loss of stage 1?"""

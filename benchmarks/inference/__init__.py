"""How many videos a second do the commands for many videos take, and what do they wait for?"""

"""Search your own videos by text.

    python examples/search_videos.py --model umt-vit-b16-25m --videos my_videos --index index --queries "a dog runs"

The model is a video-text folder: stage 2 or retrieval. Videos that are in the index already are not encoded again; it
needs the extra `search` (LanceDB). The same from the shell: `umt-hf embed`, `umt-hf search`.
"""

import argparse

from umt_hf import VideoSearcher, embed_videos


def main() -> None:
    """Put the videos into the index and print the best hits of each query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--videos", nargs="+", required=True, help="Files, and folders at any depth.")
    parser.add_argument("--index", required=True, help="Folder that is made or added to.")
    parser.add_argument("--queries", nargs="+", required=True)
    parser.add_argument("--top_k", type=int, default=5, help="How many videos per query.")
    parser.add_argument("--rerank", action="store_true", help="Let the matching head look at the best 32 again.")
    args = parser.parse_args()

    print(embed_videos(args.videos, args.model, args.index).format())
    searcher = VideoSearcher(args.index)  # loads once, answers often
    for query in args.queries:
        print(query)
        for hit in searcher.search(query, args.top_k, args.rerank):
            print(f"  {hit.similarity:.3f}  {hit.path}")


if __name__ == "__main__":
    main()

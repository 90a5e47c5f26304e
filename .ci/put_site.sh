#!/usr/bin/env bash
# put_site.sh SITE VERSION: adds a built site to the branch gh-pages, as VERSION/ and as stable/, and lists all versions.
set -euo pipefail
site=$(realpath "$1") version=$2 pages=$(mktemp -d)
git fetch origin gh-pages || true
if git rev-parse --verify --quiet origin/gh-pages > /dev/null; then
    git worktree add --quiet -B gh-pages "$pages" origin/gh-pages
else
    git worktree add --quiet --detach "$pages"
    git -C "$pages" checkout --quiet --orphan gh-pages
    git -C "$pages" rm -r --quiet --force --ignore-unmatch .
fi
cd "$pages"
touch .nojekyll # folders whose names begin with _ belong to the site
for folder in "$version" stable; do
    rm -rf "$folder"
    cp -r "$site" "$folder"
done
printf '<!doctype html>\n<meta http-equiv="refresh" content="0; url=stable/">\n<a href="stable/">cilnorm</a>\n' > index.html
{
    printf '<!doctype html>\n<meta name="viewport" content="width=device-width">\n<title>cilnorm</title>\n<ul>\n'
    for folder in $(printf '%s\n' [0-9]* | sort -rV); do printf '<li><a href="%s/">%s</a></li>\n' "$folder" "$folder"; done
    printf '</ul>\n'
} > versions.html
git add --all
git -c user.name=release -c user.email=release@localhost commit --quiet --message "The site of $version"
git push origin gh-pages

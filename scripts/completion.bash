# bash completion for @NAME@(1): the program itself knows its commands and flags.
_@NAME@() {
	local words=("${COMP_WORDS[@]:0:COMP_CWORD}") current=${COMP_WORDS[COMP_CWORD]}
	case $current in
	--) words+=(-) ;; # the program takes -- for the end of all flags
	-*) words+=("$current") ;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$("${words[@]}" --generate-bash-completion 2>/dev/null)" -- "$current")
}
complete -o bashdefault -o default -F _@NAME@ @NAME@

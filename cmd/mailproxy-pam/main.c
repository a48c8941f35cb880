/*
 * mailproxy-pam asks PAM whether a password is root's. It is the only part of mailproxy that runs as root, and does nothing else:
 * systemd starts it with a connection of mailproxy-pam.socket as standard input and output, for one question.
 *
 *   question: the address that the password came from, a newline, the password, end of file; 1,024 bytes at most
 *   answer:   "right\n", "wrong\n" or "error\n"; what is behind an error goes to standard error, which is the journal
 *
 * "wrong" is also for an account that is locked or expired, and for an empty password, whatever PAM says. How often it may be asked
 * is the daemon's to bound; a wrong password takes as long as PAM lets it, two seconds with pam_unix.
 */
#include <security/pam_appl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#define SERVICE "mailproxy" /* /etc/pam.d/mailproxy */
#define SECONDS 30          /* no question takes longer */

/* read_all reads to the end of the stream and terminates what it read; -1 where that does not fit or has a NUL in it. */
static ssize_t read_all(char *to, size_t size)
{
	size_t have = 0;
	ssize_t n;

	while ((n = read(STDIN_FILENO, to + have, size - have)) > 0)
		if ((have += (size_t)n) == size)
			return -1;
	to[have] = '\0';
	return n < 0 || strlen(to) != have ? -1 : (ssize_t)have;
}

/* converse answers PAM's question for the password with it. Any other question cannot be answered. */
static int converse(int count, const struct pam_message **asked, struct pam_response **answers, void *password)
{
	struct pam_response *all = calloc((size_t)count, sizeof(*all));
	int i, failed = all == NULL;

	for (i = 0; i < count && !failed; i++) {
		if (asked[i]->msg_style == PAM_PROMPT_ECHO_OFF)
			failed = (all[i].resp = strdup(password)) == NULL;
		else
			failed = asked[i]->msg_style == PAM_PROMPT_ECHO_ON;
	}
	if (failed) {
		while (i-- > 0) /* only where there are any */
			free(all[i].resp);
		free(all);
		return PAM_CONV_ERR;
	}
	*answers = all;
	return PAM_SUCCESS;
}

/* check gives PAM's word for root's password. */
static int check(const char *from, char *password)
{
	struct pam_conv conversation = {converse, password};
	pam_handle_t *pam = NULL;
	int code = pam_start(SERVICE, "root", &conversation, &pam);

	if (code == PAM_SUCCESS)
		code = pam_set_item(pam, PAM_RHOST, from);
	if (code == PAM_SUCCESS)
		code = pam_authenticate(pam, PAM_SILENT | PAM_DISALLOW_NULL_AUTHTOK);
	if (code == PAM_SUCCESS)
		code = pam_acct_mgmt(pam, PAM_SILENT | PAM_DISALLOW_NULL_AUTHTOK);
	if (pam != NULL)
		pam_end(pam, code);
	return code;
}

static const char *word(int code)
{
	switch (code) {
	case PAM_SUCCESS:
		return "right\n";
	case PAM_AUTH_ERR:
	case PAM_USER_UNKNOWN:
	case PAM_MAXTRIES:
	case PAM_PERM_DENIED:
	case PAM_ACCT_EXPIRED:
	case PAM_NEW_AUTHTOK_REQD:
		return "wrong\n";
	}
	fprintf(stderr, "mailproxy-pam: %s\n", pam_strerror(NULL, code));
	return "error\n";
}

int main(void)
{
	static char question[1025];
	char *password;
	const char *answer = "wrong\n";

	alarm(SECONDS);
	prctl(PR_SET_DUMPABLE, 0);
	if (read_all(question, sizeof(question)) < 0 || (password = strchr(question, '\n')) == NULL) {
		fputs("mailproxy-pam: not a question\n", stderr);
		return 1;
	}
	*password++ = '\0';
	if (*password != '\0')
		answer = word(check(question, password));
	explicit_bzero(question, sizeof(question));
	return write(STDOUT_FILENO, answer, strlen(answer)) < 0;
}

/*
 * What getaddrinfo(3) of the C library that this is linked with finds. Reads names, one a line, and prints for each
 * its addresses in the order of the answer, separated by spaces, or the error.
 */
#define _POSIX_C_SOURCE 200112L
#include <netdb.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(void) {
    char name[1024];
    while (fgets(name, sizeof name, stdin)) {
        name[strcspn(name, "\n")] = 0;
        /* SOCK_STREAM: each address once, and not once for each type of socket. */
        struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM}, *found;
        int err = getaddrinfo(name, NULL, &hints, &found);
        if (err) {
            printf("error: %s\n", gai_strerror(err));
        } else {
            for (struct addrinfo *each = found; each; each = each->ai_next) {
                char text[INET6_ADDRSTRLEN];
                const void *address = each->ai_family == AF_INET
                    ? (const void *)&((struct sockaddr_in *)each->ai_addr)->sin_addr
                    : (const void *)&((struct sockaddr_in6 *)each->ai_addr)->sin6_addr;
                inet_ntop(each->ai_family, address, text, sizeof text);
                printf(each->ai_next ? "%s " : "%s\n", text);
            }
            freeaddrinfo(found);
        }
        fflush(stdout);
    }
    return 0;
}

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.InetAddress;
import java.net.UnknownHostException;
import java.util.Arrays;
import java.util.stream.Collectors;

/** What Java finds. Reads names, one a line, and prints for each its addresses, separated by spaces, or the error. */
class Lookup {
    public static void main(String[] args) throws Exception {
        var names = new BufferedReader(new InputStreamReader(System.in));
        for (String name; (name = names.readLine()) != null; ) {
            try {
                var found = Arrays.stream(InetAddress.getAllByName(name)).map(InetAddress::getHostAddress);
                System.out.println(found.collect(Collectors.joining(" ")));
            } catch (UnknownHostException err) {
                System.out.println("error: " + err.getMessage());
            }
        }
    }
}
